"""DISP-LLM: pruned variants of a base that are lists of the channels each layer keeps."""
