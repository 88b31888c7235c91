"""Our ops inside other trainers: thin, without maths, one file per package."""
