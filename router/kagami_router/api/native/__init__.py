"""TGI's own routes, and what is asked about the server."""
