"""Data that goes on coming: sources whose samples are on a disk, more of them as time passes."""
