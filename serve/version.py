"""The one place where the version is written; the build and the changelog check read it."""

VERSION = "0.1.0"
