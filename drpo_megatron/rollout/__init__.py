"""Rollouts from SGLang: the process (`server`), control requests (`admin`), generation (`client`, `driver`)."""
