"""A reader of video files."""


class VideoFiles:
    """Reader of video files, which worker processes decode and crop."""

    def __init__(self, paths, broken=None):
        self.paths = paths
        self.broken = broken
