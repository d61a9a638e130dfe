"""Loaders: images and text in three disjoint parts."""
