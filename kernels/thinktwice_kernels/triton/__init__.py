"""Kernels that are too long for the file of their op; the launch of each checks nothing."""
