"""A trained miniature SANA-Sprint on handwritten digits: scenes, prompts, rewards, judge and bundled weights."""
