"""Evaluation: several answers to each prompt of a set, their rewards, and what can be said of a policy by them.

`sets` opens what is evaluated, `answers` samples and scores it on servers, `votes` says what a response answers,
`statistics` and `results` make numbers with intervals of it, `writing` a file and a table. `during_training` and
`command` are who asks.
"""
