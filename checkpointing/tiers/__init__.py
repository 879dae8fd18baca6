"""Where checkpoint bytes can live; one file per tier."""
