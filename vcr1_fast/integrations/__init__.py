"""Our ops inside other trainers: thin, no maths of their own, one file per package."""
