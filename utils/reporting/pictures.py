"""Images as data URIs, small enough that thousands of identities make a page that opens at once."""
import base64
import io
from pathlib import Path

from PIL import Image

from utils.faces.images import read_image
from utils.runtime.errors import UserError

MOST_BYTES = 10_000_000  # of all images of a page
SIDE = 192  # px, of the longer side at most
QUALITY = 88


class Pictures:
    """Encodes images as long as bytes are left."""

    left = MOST_BYTES

    def shown(self, file: Path | None, name: str) -> dict[str, str]:
        """An image as the template takes it: its name and a WebP data URI, empty where it cannot be read or no bytes are left."""
        return {"name": name, "src": self._uri(file) if file else ""}

    def _uri(self, file: Path) -> str:
        try:
            image = Image.fromarray(read_image(file))
        except (UserError, OSError):
            return ""  # the page says so in its place
        image.thumbnail((SIDE, SIDE), Image.Resampling.LANCZOS)
        data = io.BytesIO()
        image.save(data, "WEBP", quality=QUALITY, method=4)
        text = "data:image/webp;base64," + base64.b64encode(data.getvalue()).decode()
        if len(text) > self.left:
            return ""
        self.left -= len(text)
        return text
