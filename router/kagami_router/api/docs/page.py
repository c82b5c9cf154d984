"""The page that shows the OpenAPI document; this server serves all of it, without a CDN.

The files of Swagger UI come from a package for another framework. It is located, never imported.
"""

from collections.abc import Mapping
from functools import cache
from importlib.util import find_spec
from pathlib import Path

from aiohttp import hdrs, web

# The files that the page loads; no other file of the package is served.
_FILES: Mapping[str, str] = {
    "swagger-ui.css": "text/css",
    "index.css": "text/css",
    "favicon-16x16.png": "image/png",
    "favicon-32x32.png": "image/png",
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui-standalone-preset.js": "text/javascript",
}
# Tells the browser to load nothing from elsewhere. Swagger UI needs inline styles.
_ONLY_FROM_HERE = (
    "default-src 'self'; script-src 'self' 'unsafe-inline'; style-src 'self' 'unsafe-inline';"
    " img-src 'self' data:"
)
_PAGE = """<!DOCTYPE html>
<html lang="en">
<head>
  <meta charset="utf-8">
  <title>Kagami</title>
  <link rel="stylesheet" href="swagger-ui.css">
  <link rel="stylesheet" href="index.css">
  <link rel="icon" type="image/png" href="favicon-32x32.png" sizes="32x32">
  <link rel="icon" type="image/png" href="favicon-16x16.png" sizes="16x16">
</head>
<body>
  <div id="swagger-ui"></div>
  <script src="swagger-ui-bundle.js"></script>
  <script src="swagger-ui-standalone-preset.js"></script>
  <script>
    window.ui = SwaggerUIBundle({
      url: "../api-doc/openapi.json",
      dom_id: "#swagger-ui",
      deepLinking: true,
      validatorUrl: null,
      presets: [SwaggerUIBundle.presets.apis, SwaggerUIStandalonePreset],
      layout: "StandaloneLayout",
    });
  </script>
</body>
</html>
"""


async def to_page(request: web.Request) -> web.Response:
    """The page's address ends with a slash."""
    return web.Response(status=303, headers={hdrs.LOCATION: "/docs/"})


async def page(request: web.Request) -> web.StreamResponse:
    """Swagger UI over the OpenAPI document."""
    name = request.match_info["file"]
    if not name:
        headers = {"content-security-policy": _ONLY_FROM_HERE}
        return web.Response(text=_PAGE, content_type="text/html", headers=headers)
    content_type = _FILES.get(name)
    if content_type is None:
        raise web.HTTPNotFound
    response = web.FileResponse(_folder() / name)
    response.content_type = content_type
    return response


@cache  # where an installed package lies does not change
def _folder() -> Path:
    spec = find_spec("flask_swagger_ui")
    assert spec is not None
    assert spec.submodule_search_locations is not None, "it is one of our dependencies"
    return Path(spec.submodule_search_locations[0]) / "dist"
