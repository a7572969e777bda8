"""A client of the HTTP API: requests, streams of events, errors. It knows nothing of the server."""
