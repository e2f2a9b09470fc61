"""The change journal: the format and the words that the agent, the server and the standby share.

This package imports nothing of ours. It reads in the order of the data flow:

``errors``    every error carries fields, a sentence and a remedy
``position``  a point in the hash chain of segments
``extent``    the columnar extent table of a segment
``segment``   the binary layout, its limits and the header
``encoder``   extents and payload -> bytes
``decoder``   bytes -> a verified segment
``chain``     may this segment follow that position?
``wire``      paths and messages that cross the network
"""
