"""The lab: a protected machine, the server and a standby on one host, in network namespaces of their own."""
