"""TGI's own routes, and the routes about the server itself."""
