"""Exact sequence-parallel attention that chooses what travels: keys and values, queries and results, or heads."""
