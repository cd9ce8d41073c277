"""The differences that are meant: of which requests, at which place of the answer, and why."""

from dataclasses import dataclass
from fnmatch import fnmatchcase

from tests.parity.compare import Difference


@dataclass(frozen=True)
class Expected:
    """Patterns as of a shell: ``*`` is any text."""

    names: str
    """Of the requests."""
    paths: str
    """Of the differences: places in the answer."""
    reason: str
    incumbent: str | None = None
    """Only where the incumbent has this value."""
    longer: bool = False
    """Only where the incumbent's text is sgnode's with something in front."""

    def covers(self, name: str, difference: Difference) -> bool:
        # A path has brackets of its own, which are no sets of characters here.
        if not (fnmatchcase(name, self.names) and fnmatchcase(difference.path, self.paths.replace("[", "[[]"))):
            return False
        if self.incumbent is not None and difference.incumbent != self.incumbent:
            return False
        return not self.longer or str(difference.incumbent).endswith(f": {difference.sgnode}")


VAGUE = "dynamo.sglang hides its reason behind 'Invalid request'; sgnode says it"
NATIVE = "dynamo.sglang puts the name of Python's exception in front"
LENGTHS = "dynamo.sglang ignores max_completion_tokens in text mode, which is what the frontend makes of each API's own limit"
MEDIA = "the words that dynamo.sglang has for it without text mode"
FORMATS = "SGLang decodes whatever Pillow can; sgnode's agent admits JPEG, PNG, WEBP and GIF"
FILES = "dynamo.sglang opens files of its host for any client; sgnode those in DYN_MM_LOCAL_PATH only"
PLACES = "dynamo.sglang answers a prompt with placeholders and no images as if they were words; sgnode refuses it"
NATIVE_MEDIA = "SGLang would open and fetch what the request names; sgnode takes media where its agent judges them"
CHUNKS = "the frontend counts thoughts by the chunk; sgnode puts tokens that wait together into one"

EXPECTED = [
    Expected("main/*/min_tokens/above max_tokens", "body.message", VAGUE, "Invalid request"),
    Expected("main/chat/nvext/token_data empty*", "*message", VAGUE, "Invalid request"),
    Expected("embedding/embedding/dimensions *", "body.message", VAGUE, "Invalid request"),
    Expected("embedding/embedding/*too long*", "body.message", VAGUE, "Invalid request"),
    Expected("text/chat/too long*", "*message", VAGUE, "Invalid request"),
    Expected("embedding/embedding/empty list", "status", "dynamo.sglang answers 500 to an empty list; it is the client's error"),
    Expected("main/generate/*", "stream.chunks.data.error.message", NATIVE, longer=True),
    Expected("text/chat/max_completion_tokens", "body.choices[0].*", LENGTHS),
    Expected("text/responses/plain", "body.*", LENGTHS),
    Expected("text/messages/plain", "body.*", LENGTHS),
    Expected("text/chat/image", "body.message", MEDIA),
    Expected("parsers/*", "*.reasoning_tokens", CHUNKS),
    Expected("media/*", "*message", VAGUE, "Invalid request"),
    Expected("media/chat/media/bmp", "status", FORMATS),
    Expected("media/chat/media/tiff", "status", FORMATS),
    Expected("media/chat/media/bomb", "status", "dynamo.sglang decodes 100 megapixels to 300 MB; sgnode 64 at most"),
    Expected("media/chat/media/file*", "status", FILES),
    Expected("media/chat/media/video file", "status", FILES),
    Expected(
        "media/chat/media/*video", "status", "without a decoder on its host dynamo.sglang answers 500; sgnode takes no video"
    ),
    Expected(
        "media/chat/media/base64 escaped", "status", "a data: URL may be percent-encoded (RFC 2397); SGLang reads it as it is"
    ),
    Expected("media/chat/media/uuid", "status", "a name for a cache that SGLang lacks; sgnode takes the image beside it"),
    Expected("media/chat/media/audio", "status", "dynamo.sglang answers as if there were no audio; this model takes none"),
    Expected("media/chat/media/placeholder written, no image", "status", PLACES),
    Expected("media/completion/media/marks as *", "status", PLACES),
    Expected("media/generate/media/*", "stream.chunks.data.*", NATIVE_MEDIA),
]


def reason_of(name: str, difference: Difference) -> Expected | None:
    """The first entry that expects the difference."""
    return next((entry for entry in EXPECTED if entry.covers(name, difference)), None)
