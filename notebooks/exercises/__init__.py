"""Checkers of the exercises, one file a notebook: each takes an answer and returns a `course.Verdict`."""
