//! Every level gives the same bits as the scalar body.
