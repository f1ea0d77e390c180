"""Semantic segmentation on ADE20K-style data."""
