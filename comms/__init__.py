"""Bytes between ranks: schedules as data, their builders, and the readers that check, run, cost and simulate them."""
