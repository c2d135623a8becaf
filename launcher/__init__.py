"""A job file becomes running ranks."""
