"""Loading models, packed while they are read."""
