"""One file for each vendor: wire types, routes, and pure functions between them and the domain."""
