"""The page itself, in Chromium."""
