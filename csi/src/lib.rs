//! The CSI adapter: not built yet; it will speak only pando.v1 to the daemon.
