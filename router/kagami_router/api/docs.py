"""The page that shows the OpenAPI document; all of it is served from here, no CDN."""

from collections.abc import Mapping

import swagger_ui_bundle
from aiohttp import hdrs, web

# What the page loads, and no other file of the package.
_FILES: Mapping[str, str] = {
    "swagger-ui.css": "text/css",
    "index.css": "text/css",
    "favicon-16x16.png": "image/png",
    "favicon-32x32.png": "image/png",
    "swagger-ui-bundle.js": "text/javascript",
    "swagger-ui-standalone-preset.js": "text/javascript",
}
_PAGE = "index.html"
_INITIALIZER = "swagger-initializer.js"
# In place of the package's own, which would load an example from another server.
_INITIALIZER_SOURCE = """window.onload = () => {
  window.ui = SwaggerUIBundle({
    url: "../api-doc/openapi.json",
    dom_id: "#swagger-ui",
    deepLinking: true,
    validatorUrl: null,
    presets: [SwaggerUIBundle.presets.apis, SwaggerUIStandalonePreset],
    layout: "StandaloneLayout",
  });
};
"""


async def to_page(request: web.Request) -> web.Response:
    """The page's address ends with a slash."""
    return web.Response(status=303, headers={hdrs.LOCATION: "/docs/"})


async def page(request: web.Request) -> web.StreamResponse:
    """Swagger UI over the OpenAPI document."""
    name = request.match_info["file"] or _PAGE
    if name == _INITIALIZER:
        return web.Response(text=_INITIALIZER_SOURCE, content_type="text/javascript")
    content_type = "text/html" if name == _PAGE else _FILES.get(name)
    if content_type is None:
        raise web.HTTPNotFound
    response = web.FileResponse(swagger_ui_bundle.swagger_ui_path / name)
    response.content_type = content_type
    return response
