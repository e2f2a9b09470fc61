"""Takeover: from a machine that serves to its standby, and back.

``states``      the words and the one transition table
``record``      the durable record of one takeover
``plan``        what to do next, as a pure function; the invariants
``fence``       why nobody else can serve when the standby does
``ports``       everything that is touched, as protocols
``acts``        how each act is done against the ports
``drive``       the loop of one takeover between planner and acts
``controller``  all takeovers of a server: start, resume, commit, roll back, retry
``address``     IP drift on one machine, shared with the agent and the PE (``frames``, ``routes`` belong to it)

``docs/takeover.md`` tells the whole story.
"""
