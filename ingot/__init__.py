"""Ahead-of-time export of sparse and state-space language models, with proof of the numbers.

The one name that an installed Ingot has. In the repository its parts are links to the folders
beside this one.
"""
