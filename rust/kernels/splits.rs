//! Cutting a sorted run in three: the best cut so far.

/// Weights of a run of IQ1_S and of IQ1_M.
pub const RUN_S: usize = 32;
pub const RUN_M: usize = 16;

/// Three levels, shifted up and down.
pub type Shifted = [[f32; 3]; 2];

/// The best cut so far. One wins if B > 0 and A² > mark·B; the scale is then A/B, the mark A²/B.
#[derive(Debug)]
pub struct Best {
    mark: f32,
    /// A/B.
    pub scale: f32,
    /// Where the second and the third part begin, and the choice of shifts.
    pub cut: Option<(usize, usize, usize)>,
}

impl Best {
    /// None yet.
    pub const NONE: Best = Best {
        mark: f32::MIN,
        scale: 0.0,
        cut: None,
    };

    /// A²/B.
    #[cfg_attr(any(feature = "scalar", not(target_arch = "x86_64")), allow(dead_code))]
    pub fn mark(&self) -> f32 {
        self.mark
    }

    /// One cut: A, B, and which one it is.
    #[inline]
    pub fn offer(&mut self, cross: f32, power: f32, cut: (usize, usize, usize)) {
        if power > 0.0 && cross * cross > self.mark * power {
            self.scale = cross / power;
            self.mark = self.scale * cross;
            self.cut = Some(cut);
        }
    }
}
