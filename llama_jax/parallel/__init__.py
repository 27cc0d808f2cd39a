"""Meshes, logical axes and their rule tables: the only package that names a mesh axis."""
