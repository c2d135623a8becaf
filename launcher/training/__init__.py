"""The main job of a rank: model, data, engines, loop, export."""
