"""Recipes as YAML files, one per run that somebody would name in a sentence."""
