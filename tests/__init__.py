"""The tests, and what they share: harnesses and models in ``support``, programs in ``integration/workers``."""
