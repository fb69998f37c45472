"""The parts a test, a benchmark or the demo is run against."""
