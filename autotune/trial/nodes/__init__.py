"""Launches over several hosts: one leads, the others start their ranks as it says.

No file system is shared. The leader is a `Starter`: to whoever launches, a rank of another host is
a `RankProcess` as any other, and its files appear in the launch's folder.
"""
