//! Fixed code tables.
