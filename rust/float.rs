//! Float conversions.
