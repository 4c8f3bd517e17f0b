//! Which points of an IQ grid are near a point that is not on it.
//!
//! A point is a code: digit i of it, the lowest first, is the level of weight i. A search rounds each
//! weight to a level by itself; if the code that comes out is not on the grid, one of the grid's points
//! near it is taken instead. Near are all points at the smallest distances, as many different
//! distances as the type asks for (distance: Σ of squared differences of digits), ordered by distance,
//! then by index in the grid. The order decides between points that are equally good later.
//!
//! | type | distances |
//! |---|---|
//! | IQ2_S | 1 |
//! | IQ2_XXS, IQ2_XS, IQ3_XXS | 2 |
//! | IQ3_S, IQ1 | 3 |
//!
//! The lists are made on first use, once per process.
//!
//! Source: ggml 0.25.3, `ggml-quants.c` (`iq2xs_init_impl`, `iq3xs_init_impl`).

use std::sync::OnceLock;

use super::iq_grids;
use crate::kernels::points::{Lists, ON_GRID, STEP};

/// A grid and the lists of near points.
pub struct Grid(Lists);

/// Where a code stands.
pub enum Place<'a> {
    /// On the grid, at this index.
    On(u16),
    /// Near these points.
    Near(&'a [u16]),
}

impl Grid {
    /// Where `code` stands. Every digit must be a level of the grid.
    pub fn place(&self, code: u16) -> Place<'_> {
        let place = self.0.places.get(usize::from(code)).copied();
        // Codes with digits that are no levels do not come up; they are taken for the first point.
        let place = place.unwrap_or(ON_GRID);
        if place & ON_GRID != 0 {
            return Place::On(place as u16);
        }
        let list = self.0.near.get(place as usize..).unwrap_or_default();
        let (steps, codes) = list.split_first().unwrap_or((&0, &[]));
        Place::Near(&codes[..codes.len().min(usize::from(*steps) * STEP)])
    }

    /// All of it, for faster searches.
    pub fn lists(&self) -> &Lists {
        &self.0
    }

    /// Index of the point `code`.
    pub fn index(&self, code: u16) -> u16 {
        match self.place(code) {
            Place::On(index) => index,
            Place::Near(_) => 0,
        }
    }

    /// `points` have `bits` bits per digit, and digits up to `top`.
    fn new(points: &[u16], bits: usize, top: usize, distances: usize) -> Self {
        let digits = if bits == 2 { 8 } else { 4 };
        let half = bits * digits / 2;
        let parts = |code: usize| (code & ((1 << half) - 1), code >> half);
        let digit = |code: usize, i: usize| code >> (bits * i) & ((1 << bits) - 1);
        let distance = |a: usize, b: usize| {
            let squares = (0..digits / 2).map(|i| digit(a, i).abs_diff(digit(b, i)).pow(2));
            squares.sum::<usize>() as u8
        };
        let between: Vec<Vec<u8>> = (0..1 << half)
            .map(|a| (0..1 << half).map(|b| distance(a, b)).collect())
            .collect();

        let highest = (0..digits).fold(0, |code, _| code << bits | top);
        let mut places = vec![0; highest + 1];
        for (index, &point) in points.iter().enumerate() {
            places[usize::from(point)] = ON_GRID | index as u32;
        }
        let mut near = Vec::new();
        let mut far = vec![0; points.len()];
        for (code, place) in places.iter_mut().enumerate() {
            if *place & ON_GRID != 0 || (0..digits).any(|i| digit(code, i) > top) {
                continue;
            }
            let (low, high) = parts(code);
            let (to_low, to_high) = (&between[low], &between[high]);
            let mut seen = [false; 256];
            for (far, &point) in far.iter_mut().zip(points) {
                let (low, high) = parts(usize::from(point));
                *far = to_low[low] + to_high[high];
                seen[usize::from(*far)] = true;
            }
            *place = near.len() as u32;
            let start = near.len() + 1;
            near.push(0);
            let smallest = (0..=u8::MAX).filter(|&distance| seen[usize::from(distance)]);
            for distance in smallest.take(distances) {
                let at_it = points.iter().zip(&far).filter(|(_, &far)| far == distance);
                near.extend(at_it.map(|(&point, _)| point));
            }
            let steps = (near.len() - start).div_ceil(STEP);
            near[start - 1] = steps as u16;
            near.resize(start + steps * STEP, near[start]);
        }
        Grid(Lists {
            bits: bits as u32,
            places,
            near,
        })
    }
}

/// Defines the grids, each made once.
macro_rules! grids {
    ($($name:ident: $codes:ident, $bits:literal bits to $top:literal, $distances:literal distances;)*) => {$(
        /// The grid of this name in [`iq_grids`].
        pub fn $name() -> &'static Grid {
            static GRID: OnceLock<Grid> = OnceLock::new();
            GRID.get_or_init(|| Grid::new(&iq_grids::$codes, $bits, $top, $distances))
        }
    )*};
}

grids! {
    iq2_xxs: IQ2_XXS_CODES, 2 bits to 2, 2 distances;
    iq2_xs: IQ2_XS_CODES, 2 bits to 2, 2 distances;
    iq2_s: IQ2_S_CODES, 2 bits to 2, 1 distances;
    iq3_xxs: IQ3_XXS_CODES, 3 bits to 7, 2 distances;
    iq3_s: IQ3_S_CODES, 3 bits to 7, 3 distances;
    iq1: IQ1_CODES, 2 bits to 2, 3 distances;
}
