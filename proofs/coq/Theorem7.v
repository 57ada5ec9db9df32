(** * Theorem 7 and the Frobenius bound

    Let [A] be a d x d real matrix with [|A x| <= L |x|] for every column [x] (Euclidean norm), [L < 1], and write
    [E(A) = tr A - ln |det (I + A)|] and [h L = - ln (1 - L) - L].  In words:

    - [theorem7]: [|E(A)| <= d h(L)];
    - [frobenius_bound]: [|E(A)| <= (|A|_F^2 / L^2) h(L)] if moreover [0 < L];
    - [frobenius_le_theorem7]: [|A|_F^2 <= d L^2], so that the second bound is never the larger one;
    - [det_residual_neq0]: [det (I + A) <> 0], so that the logarithm is that of a positive number.

    Proof: the complex eigenvalues [z] of [A] satisfy [|z| <= L] (apply the hypothesis to the real and imaginary
    parts of an eigenvector); trace and determinant are the sum of the [z] and the product of the [1 + z]; each
    [Re z - ln |1 + z|] is at most [h |z|] in absolute value ([Scalar]); [h s / s^2] increases and
    [sum |z|^2 <= |A|_F^2] ([Spectrum]). *)

From Coq Require Import Reals.
From mathcomp Require Import all_ssreflect all_algebra.
From mathcomp.analysis Require Import Rstruct.
From mathcomp.real_closed Require Import complex.
From hnkit Require Import Scalar RealBridge Euclid Spectrum.

Set Implicit Arguments.
Unset Strict Implicit.
Unset Printing Implicit Defensive.

Import Order.TTheory GRing.Theory Num.Theory.
Local Open Scope ring_scope.
Local Open Scope complex_scope.

Local Notation C := R[i].
Local Notation Re := (@complex.Re R).
Local Notation Im := (@complex.Im R).
Local Notation modulus := (@ComplexField.Normc.normc R_rcfType).

(** ** Definitions *)

(** [E(A) = tr A - ln |det (I + A)|]. *)
Definition logdet_error d (A : 'M[R]_d) : R := \tr A - ln `|\det (1%:M + A)|.

(** The squared Frobenius norm. *)
Definition frobenius2 d (A : 'M[R]_d) : R := \sum_i \sum_j A i j ^+ 2.

(** [|A x| <= L |x|] for all [x], that is [|A|_2 <= L]. *)
Definition opnorm_le d (A : 'M[R]_d) (L : R) : Prop := forall x : 'cV[R]_d, norm2 (A *m x) <= L * norm2 x.

(** ** Complex numbers *)

Lemma modulusE (z : C) : modulus z ^+ 2 = Re z ^+ 2 + Im z ^+ 2.
Proof. by case: z => a b /=; rewrite sqr_sqrtr // addr_ge0 ?sqr_ge0. Qed.

Lemma modulus_ge0 (z : C) : 0 <= modulus z.
Proof. by case: z => a b; exact: sqrtr_ge0. Qed.

Lemma Re_le_modulus (z : C) : `|Re z| <= modulus z.
Proof.
rewrite -ler_sqr ?nnegrE ?modulus_ge0 // real_normK ?num_real // modulusE.
by rewrite ler_addl sqr_ge0.
Qed.

Lemma modulus_real (a : R) : modulus a%:C = `|a|.
Proof. by rewrite /= expr0n addr0 sqrtr_sqr. Qed.

Lemma modulus_prod (s : seq C) (F : C -> C) :
  modulus (\prod_(z <- s) F z) = \prod_(z <- s) modulus (F z).
Proof.
apply: (big_morph modulus) => [x y|]; first exact: ComplexField.Normc.normcM.
exact: ComplexField.Normc.normc1.
Qed.

(** The scalar inequality for one eigenvalue. *)
Lemma logdet_eigenvalue (z : C) : modulus z < 1 -> `|Re z - ln (modulus (1 + z))| <= h (modulus z).
Proof.
move=> z1; apply: logdetR_modulus => //; rewrite ?modulus_ge0 ?Re_le_modulus //.
rewrite !modulusE; case: z {z1} => a b /=.
by rewrite add0r sqrrD expr1n mul1r mulr2n !addrA.
Qed.

Lemma modulus_add1_gt0 (z : C) : modulus z < 1 -> 0 < modulus (1 + z).
Proof.
move=> z1; rewrite lt_neqAle modulus_ge0 andbT eq_sym; apply/eqP => /ComplexField.Normc.eq0_normc e.
have zN1 : z = -1 by apply/eqP; rewrite -addr_eq0 addrC e.
by move: z1; rewrite zN1 /= oppr0 expr0n addr0 sqrrN expr1n sqrtr1 ltxx.
Qed.

(** ** Eigenvalues of a matrix of norm at most [L] *)

Section Eigenvalues.
Variables (d : nat) (A : 'M[R]_d) (L : R).
Hypothesis A_le : opnorm_le A L.

(** The complex matrix whose row eigenvectors are the column eigenvectors of [A]. *)
Let Ac : 'M[C]_d := map_mx (real_complex R) A^T.

Lemma eigenvalue_le z (v : 'rV[C]_d) : v *m Ac = z *: v -> v != 0 -> modulus z <= L.
Proof.
move=> vA v0.
pose a : 'cV[R]_d := \col_i Re (v 0 i); pose b : 'cV[R]_d := \col_i Im (v 0 i).
pose N := sqnorm a + sqnorm b.
have N0 : 0 < N.
  rewrite lt_neqAle eq_sym addr_ge0 ?sqnorm_ge0 // andbT.
  apply: contraNneq v0 => /eqP; rewrite paddr_eq0 ?sqnorm_ge0 //.
  move=> /andP[/eqP/sqnorm_eq0/colP a0 /eqP/sqnorm_eq0/colP b0].
  by apply/eqP/rowP => i; apply/eqP; move: (a0 i) (b0 i); rewrite eq_complex !mxE => -> ->; rewrite eqxx.
have Aab : sqnorm (A *m a) + sqnorm (A *m b) = modulus z ^+ 2 * N.
  rewrite /N /sqnorm -!big_split mulr_sumr; apply: eq_bigr => i _ /=.
  have := congr1 (fun w : 'rV[C]_d => w 0 i) vA; rewrite !mxE => e.
  have -> : \sum_j A i j * a j 0 = Re (z * v 0 i).
    rewrite -e raddf_sum; apply: eq_bigr => j _ /=; rewrite !mxE mulrC.
    by case: (v 0 j) => p q /=; rewrite mulr0 subr0.
  have -> : \sum_j A i j * b j 0 = Im (z * v 0 i).
    rewrite -e raddf_sum; apply: eq_bigr => j _ /=; rewrite !mxE mulrC.
    by case: (v 0 j) => p q /=; rewrite mulr0 add0r.
  by rewrite -modulusE ComplexField.Normc.normcM exprMn [modulus (v 0 i) ^+ 2]modulusE.
have L0 : 0 <= L.
  have [x x0] : exists x : 'cV[R]_d, 0 < norm2 x.
    have [a0 | a_ne] := eqVneq (sqnorm a) 0.
      by exists b; rewrite sqrtr_gt0; move: N0; rewrite /N a0 add0r.
    by exists a; rewrite sqrtr_gt0 lt_neqAle eq_sym a_ne sqnorm_ge0.
  by rewrite -(pmulr_lge0 _ x0) (le_trans _ (A_le x)) // norm2_ge0.
rewrite -ler_sqr ?nnegrE ?modulus_ge0 // -(ler_pmul2r N0) -Aab mulrDr.
by rewrite -!sqr_norm2 -!exprMn ler_add // ler_sqr ?nnegrE ?mulr_ge0 ?norm2_ge0.
Qed.

Lemma spectrum_real : exists s : seq C,
  [/\ size s = d, forall z, z \in s -> modulus z <= L,
      \tr A = \sum_(z <- s) Re z,
      `|\det (1%:M + A)| = \prod_(z <- s) modulus (1 + z) &
      \sum_(z <- s) modulus z ^+ 2 <= frobenius2 A].
Proof.
have [s As] := spectrum_exists Ac; exists s; split.
- exact: spectrum_size As.
- by move=> z /(spectrum_eigen As)[v vA v0]; exact: eigenvalue_le vA v0.
- rewrite -(raddf_sum [additive of Re]) -(spectrum_trace As).
  by rewrite /Ac trace_map_mx mxtrace_tr.
- rewrite -modulus_prod -(spectrum_det As) -modulus_real; congr modulus.
  by rewrite /Ac -(map_mx1 [rmorphism of real_complex R]) -map_mxD det_map_mx -[in LHS]det_tr linearD /= trmx1.
- rewrite -lecR; have := schur As.
  have -> : fro2 Ac = (frobenius2 A)%:C.
    rewrite fro2E exchange_big rmorph_sum; apply: eq_bigr => i _.
    rewrite rmorph_sum; apply: eq_bigr => j _.
    by rewrite !mxE normc_def /= expr0n addr0 sqrtr_sqr -rmorphX real_normK ?num_real.
  congr (_ <= _); rewrite rmorph_sum; apply: eq_bigr => z _.
  by rewrite rmorphX; case: z.
Qed.

End Eigenvalues.

(** ** The theorems *)

Section Bounds.
Variables (d : nat) (A : 'M[R]_d) (L : R).
Hypotheses (A_le : opnorm_le A L) (L1 : L < 1).

Theorem det_residual_neq0 : \det (1%:M + A) != 0.
Proof.
have [s [_ s_le _ s_det _]] := spectrum_real A_le.
rewrite -normr_eq0 s_det gt_eqF // big_seq prodr_gt0 // => z /s_le le.
by rewrite modulus_add1_gt0 // (le_lt_trans le).
Qed.

(** The error is at most the sum of [h |z|] over the eigenvalues. *)
Lemma logdet_error_le_sum s : (forall z, z \in s -> modulus z <= L) ->
  \tr A = \sum_(z <- s) Re z -> `|\det (1%:M + A)| = \prod_(z <- s) modulus (1 + z) ->
  `|logdet_error A| <= \sum_(z <- s) h (modulus z).
Proof.
move=> s_le s_tr s_det; rewrite /logdet_error s_tr s_det.
have s_lt z : z \in s -> modulus z < 1 by move=> /s_le le; exact: le_lt_trans le L1.
rewrite lnR_prod => [|z /s_lt/modulus_add1_gt0 //]; rewrite -sumrB.
apply: (le_trans (ler_norm_sum _ _ _)); rewrite big_seq [leRHS]big_seq.
by apply: ler_sum => z /s_lt/logdet_eigenvalue.
Qed.

Theorem theorem7 : `|logdet_error A| <= d%:R * h L.
Proof.
have [s [s_size s_le s_tr s_det _]] := spectrum_real A_le.
apply: (le_trans (logdet_error_le_sum s_le s_tr s_det)).
rewrite -s_size -sum1_size natr_sum mulr_suml big_seq [leRHS]big_seq.
apply: ler_sum => z zs; rewrite mul1r.
by apply: hR_monotone => //; [exact: modulus_ge0 | exact: s_le].
Qed.

Theorem frobenius_bound : 0 < L -> `|logdet_error A| <= frobenius2 A / L ^+ 2 * h L.
Proof.
move=> L0; have [s [_ s_le s_tr s_det s_fro]] := spectrum_real A_le.
apply: (le_trans (logdet_error_le_sum s_le s_tr s_det)).
have hL0 : 0 <= h L by apply: hR_ge0 => //; exact: ltW.
apply: (@le_trans _ _ (\sum_(z <- s) modulus z ^+ 2 / L ^+ 2 * h L)).
  rewrite big_seq [leRHS]big_seq; apply: ler_sum => z zs.
  by apply: hR_ratio => //; [exact: modulus_ge0 | exact: s_le].
rewrite -!mulr_suml; apply: ler_wpmul2r => //; apply: ler_wpmul2r => //.
by rewrite invr_ge0 exprn_ge0 // ltW.
Qed.

Theorem frobenius_le_theorem7 : frobenius2 A <= d%:R * L ^+ 2.
Proof.
have -> : d%:R * L ^+ 2 = \sum_(j < d) L ^+ 2 by rewrite sumr_const card_ord mulr_natl.
rewrite /frobenius2 exchange_big /=; apply: ler_sum => j _.
have e1 : norm2 (delta_mx j 0 : 'cV[R]_d) = 1.
  rewrite /norm2 /sqnorm (bigD1 j) //= big1 => [|i ij]; rewrite mxE ?(negbTE ij) ?expr0n //.
  by rewrite !eqxx expr1n addr0 sqrtr1.
have := A_le (delta_mx j 0); rewrite e1 mulr1 -colE => le.
have L0 : 0 <= L := le_trans (norm2_ge0 _) le.
have -> : \sum_i A i j ^+ 2 = norm2 (col j A) ^+ 2.
  by rewrite sqr_norm2; apply: eq_bigr => i _; rewrite mxE.
by rewrite ler_sqr ?nnegrE ?norm2_ge0.
Qed.

End Bounds.
