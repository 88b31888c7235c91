"""Settings: how they are declared, read, checked and documented, and those that commands share."""
