"""The parts behind the public functions; nothing here is public."""
