"""Drop-ins for other projects: `liger`, `trl` and `verl`, each to be imported by name.

They speak the other project's call signatures and shapes, padded [B, T] where it has them, and compute with the ops
of this package. The other project need not be installed, but for `trl`, which patches it.
"""
