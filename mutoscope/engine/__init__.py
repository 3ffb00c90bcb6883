"""The engine: requests in, frames out. It knows no HTTP, no database and no jobs."""
