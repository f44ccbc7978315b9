"""Checks of the exercises: each takes a student's function and returns one sentence.

"right: ...", "not written yet: ..." for a function that returns None, or what the mistake is. A
check never raises on a student's error: exceptions and wrong shapes become a sentence, too.
"""
