"""Pipes that stream like the plugins in use today, to be measured beside ours."""
