"""Data sets: files and hub data sets -> examples -> encoded rows on disk; unusable rows become errors that say why.

The text of rows may be confidential: messages contain the location of a row and never its text.
"""
