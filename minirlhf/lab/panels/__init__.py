"""Panels: a module a figure that follows a dial."""
