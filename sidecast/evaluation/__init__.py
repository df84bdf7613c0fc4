"""The yardstick: trains many small models alike but for one thing, and says what that thing is worth."""
