"""The JSON of every route, as msgspec structs; nothing behind `api` knows them."""
