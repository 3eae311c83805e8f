"""One short module a verb, no logic."""
